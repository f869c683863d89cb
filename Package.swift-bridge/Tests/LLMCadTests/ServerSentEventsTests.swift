import XCTest

@testable import LLMCad

final class ServerSentEventsTests: XCTestCase {
    private func events(_ pieces: [[UInt8]]) throws -> [String] {
        var events = ServerSentEvents()
        return try pieces.flatMap { try events.append(Data($0)) }
    }

    private func events(_ text: String) throws -> [String] {
        try events([Array(text.utf8)])
    }

    func testEventsAreSplitAtEmptyLines() throws {
        XCTAssertEqual(try events("data: a\n\ndata: b\n\n"), ["a", "b"])
    }

    func testAllLineEnds() throws {
        XCTAssertEqual(try events("data: a\r\n\r\ndata: b\r\rdata: c\n\n"), ["a", "b", "c"])
    }

    func testCommentsAndOtherFieldsAreLeftOut() throws {
        XCTAssertEqual(try events(": ping\n\nevent: x\nid: 1\ndata: a\nretry: 5\n\n"), ["a"])
    }

    func testOneSpaceAfterTheColonIsNotData() throws {
        XCTAssertEqual(try events("data:a\n\ndata:  b\n\ndata: x:y\n\n"), ["a", " b", "x:y"])
    }

    func testDataLinesAreJoined() throws {
        XCTAssertEqual(try events("data: a\ndata: b\n\n"), ["a\nb"])
    }

    func testAnUnfinishedEventIsNotReturned() throws {
        XCTAssertEqual(try events("data: a\n\ndata: b\n"), ["a"])
    }

    func testAnyCutGivesTheSameEvents() throws {
        let bytes = Array("data: a\u{1F642}é\r\n\r\n: ping\r\n\r\ndata: {\"b\": \"\u{4F60}\"}\n\n".utf8)
        let whole = try events([bytes])
        XCTAssertEqual(whole, ["a\u{1F642}é", "{\"b\": \"\u{4F60}\"}"])
        for cut in 0...bytes.count {
            XCTAssertEqual(try events([Array(bytes[..<cut]), Array(bytes[cut...])]), whole, "cut at \(cut)")
        }
        XCTAssertEqual(try events(bytes.map { [$0] }), whole)
    }

    func testBytesThatAreNotUTF8AreRefused() {
        XCTAssertThrowsError(try events([Array("data: ".utf8) + [0xFF, 0x0A]])) { error in
            XCTAssertEqual(error as? LLMCadError, .malformedResponse("a line that is not UTF-8"))
        }
    }

    func testALineWithoutEndIsRefused() {
        let piece = [UInt8](repeating: UInt8(ascii: "x"), count: ServerSentEvents.maximumLineBytes + 1)
        XCTAssertThrowsError(try events([piece]))
    }
}
