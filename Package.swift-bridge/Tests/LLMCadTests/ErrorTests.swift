import XCTest

@testable import LLMCad

final class ErrorTests: XCTestCase {
    private func error(_ status: Int, _ body: String, retryAfter: String? = nil) -> LLMCadError {
        LLMCadError(status: status, retryAfter: retryAfter, body: Data(body.utf8))
    }

    private let body = #"{"error": {"message": "why", "type": "t", "param": "top_p", "code": null}}"#

    func testStatuses() {
        XCTAssertEqual(error(400, body), .badRequest(message: "why", param: "top_p"))
        XCTAssertEqual(error(401, body), .unauthorized(message: "why"))
        XCTAssertEqual(error(404, body), .notFound(message: "why"))
        XCTAssertEqual(error(413, body), .requestTooLarge(message: "why"))
        XCTAssertEqual(error(429, body, retryAfter: "12"), .queueFull(retryAfter: 12))
        XCTAssertEqual(error(429, body), .queueFull(retryAfter: nil))
        XCTAssertEqual(error(503, body), .serverUnavailable(message: "why"))
        XCTAssertEqual(error(500, body), .unexpectedStatus(500, message: "why"))
    }

    func testAnswersOfOtherServers() {
        guard case .unexpectedStatus(502, let message) = error(502, "<html>") else {
            return XCTFail("another error")
        }
        XCTAssertFalse(message.isEmpty)
        XCTAssertFalse(message.contains("html"))
        XCTAssertEqual(error(429, "", retryAfter: "Wed, 21 Oct 2026 07:28:00 GMT"), .queueFull(retryAfter: nil))
    }

    func testEveryErrorSaysWhatHappened() {
        let messages: [(LLMCadError, String)] = [
            (.invalidEndpoint("mac"), "mac is not a server's address; give one like http://mac.local:8080"),
            (.badRequest(message: "why", param: nil), "why"),
            (.queueFull(retryAfter: 1.5), "the server has too many requests waiting; try again in 2 s"),
            (.malformedResponse("id is missing"), "the server's answer could not be read: id is missing"),
        ]
        for (error, message) in messages {
            XCTAssertEqual(error.localizedDescription, message)
        }
    }
}
