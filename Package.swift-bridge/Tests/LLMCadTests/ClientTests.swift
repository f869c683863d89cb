#if os(macOS) || os(Linux)
import XCTest

@testable import LLMCad

private func texts(_ events: AsyncThrowingStream<ChatEvent, any Error>) async throws -> [String] {
    var texts: [String] = []
    for try await event in events {
        if case .text(let text, _) = event { texts.append(text) }
    }
    return texts
}

/// The client against a server that says exactly what each test wants.
final class ClientTests: XCTestCase {
    private func client(_ server: FakeServer, key: String? = nil, timeout: TimeInterval = 30) -> LLMCadClient {
        LLMCadClient(endpoint: server.url, apiKey: key, timeout: timeout)
    }

    func testChat() async throws {
        let server = try FakeServer { _ in FakeServer.json(200, Samples.answer) }
        let answer = try await client(server, key: "a-secret-key").chat([.user("Hi")])
        XCTAssertEqual(answer.text, "Hello")
        let request = try XCTUnwrap(server.requests.first)
        XCTAssertTrue(request.head.hasPrefix("POST /v1/chat/completions HTTP/1.1"))
        XCTAssertTrue(request.head.lowercased().contains("content-type: application/json"))
        XCTAssertTrue(request.head.contains("Authorization: Bearer a-secret-key"))
        XCTAssertFalse("\(client(server, key: "a-secret-key"))".contains("secret"))
    }

    func testModelsAndHealth() async throws {
        let list =
            #"{"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "llmcad-mlx"}]}"#
        let server = try FakeServer { request in
            FakeServer.json(200, request.head.hasPrefix("GET /health ") ? #"{"status": "ok"}"# : list)
        }
        let models = try await client(server).models()
        XCTAssertEqual(models.map(\.id), ["m"])
        let health = try await client(server).health()
        XCTAssertEqual(health.status, "ok")
        XCTAssertTrue(server.requests[0].head.hasPrefix("GET /v1/models "))
    }

    func testAnEndpointMayEndWithV1() async throws {
        let server = try FakeServer { _ in FakeServer.json(200, #"{"data": []}"#) }
        for end in ["/v1", "/v1/", "/"] {
            let endpoint = try XCTUnwrap(URL(string: server.url.absoluteString + end))
            let models = try await LLMCadClient(endpoint: endpoint).models()
            XCTAssertEqual(models, [])
        }
        XCTAssertEqual(
            server.requests.map { $0.head.prefix(15) },
            ["GET /v1/models ", "GET /v1/models ", "GET /v1/models "])
    }

    func testStream() async throws {
        let server = try FakeServer { _ in [FakeServer.streamHead] + Samples.stream.map(FakeServer.Step.send) }
        var events: [ChatEvent] = []
        for try await event in client(server).stream([.user("Hi")]) { events.append(event) }
        XCTAssertEqual(events.count, 3)
        XCTAssertEqual(events.first, .text("Hel", tokens: []))
        guard case .finished(.length, let usage?) = events.last else { return XCTFail("\(events)") }
        XCTAssertEqual(usage.speculation?.accepted, 5)
    }

    func testTextsComeWhenTheyAreSent() async throws {
        // The second text is only sent when the client, having read the first, has made another request.
        let gate = Locked(false)
        let server = try FakeServer { request in
            if request.head.hasPrefix("GET") {
                gate.withLock { $0 = true }
                return FakeServer.json(200, #"{"status": "ok"}"#)
            }
            return [FakeServer.streamHead, .send(Samples.stream[0]), .waitUntil { gate.withLock { $0 } }]
                + Samples.stream.dropFirst().map(FakeServer.Step.send)
        }
        var seen: [String] = []
        for try await event in client(server).stream([.user("Hi")]) {
            guard case .text(let text, _) = event else { continue }
            seen.append(text)
            if seen.count == 1 { _ = try await client(server).health() }
        }
        XCTAssertEqual(seen, ["Hel", "lo"])
    }

    func testCutBytes() async throws {
        let whole = Samples.stream.joined()
        let server = try FakeServer { _ in
            [FakeServer.streamHead] + whole.map { FakeServer.Step.send(String($0)) }
        }
        let seen = try await texts(client(server).stream([.user("Hi")]))
        XCTAssertEqual(seen, ["Hel", "lo"])
    }

    func testLeavingTheLoopClosesTheConnection() async throws {
        let server = try FakeServer { _ in [FakeServer.streamHead, .send(Samples.stream[0]), .awaitDisconnect]
        }
        for try await _ in client(server).stream([.user("Hi")]) { break }
        await eventually("closed") { server.disconnects == 1 }
    }

    func testCancellingTheTaskClosesTheConnection() async throws {
        let server = try FakeServer { _ in [FakeServer.streamHead, .send(Samples.stream[0]), .awaitDisconnect]
        }
        let client = client(server)
        let reading = Task { try await texts(client.stream([.user("Hi")])) }
        await eventually("asked") { server.requests.count == 1 }
        reading.cancel()
        await eventually("closed") { server.disconnects == 1 }
        let seen = try await reading.value
        XCTAssertLessThanOrEqual(seen.count, 1)
    }

    func testCancellingAChatClosesTheConnection() async throws {
        let server = try FakeServer { _ in [.awaitDisconnect] }
        let client = client(server)
        let asking = Task { try await client.chat([.user("Hi")]) }
        await eventually("asked") { server.requests.count == 1 }
        asking.cancel()
        await eventually("closed") { server.disconnects == 1 }
        do {
            _ = try await asking.value
            XCTFail("no error")
        } catch {
            XCTAssertTrue(error is CancellationError, "\(error)")
        }
    }

    func testManyRequestsCancelledAtAnyMoment() async throws {
        let server = try FakeServer { _ in
            [FakeServer.streamHead]
                + Samples.stream.flatMap { [FakeServer.Step.send($0), .pause(milliseconds: 1)] }
        }
        let client = client(server)
        let whole = try await withThrowingTaskGroup(of: Bool.self) { group in
            for index in 0..<60 {
                group.addTask {
                    let reading = Task { try await texts(client.stream([.user("Hi")])) == ["Hel", "lo"] }
                    if index % 3 != 0 {
                        try await Task.sleep(for: .microseconds(200 * index))
                        reading.cancel()
                        _ = try await reading.value
                        return false
                    }
                    return try await reading.value
                }
            }
            return try await group.reduce(0) { $0 + ($1 ? 1 : 0) }
        }
        XCTAssertEqual(whole, 20)
    }

    func testNoConnectionIsLeftOpen() async throws {
        let server = try FakeServer { _ in [FakeServer.streamHead] + Samples.stream.map(FakeServer.Step.send) }
        func openFiles() throws -> Int { try FileManager.default.contentsOfDirectory(atPath: "/dev/fd").count }
        _ = try await texts(client(server).stream([.user("Hi")]))
        let before = try openFiles()
        for index in 0..<40 {
            for try await _ in client(server).stream([.user("Hi")]) where index % 2 == 0 { break }
        }
        try await eventually("closed") { try openFiles() <= before }
    }

    func testAServerThatIsGoneAnswersNoOne() async throws {
        // Its thread may only begin when its socket's number already is another server's.
        for _ in 0..<200 {
            do { _ = try FakeServer { _ in FakeServer.json(200, #"{"status": "gone"}"#) } }
            let server = try FakeServer { _ in FakeServer.json(200, #"{"status": "here"}"#) }
            let health = try await client(server).health()
            XCTAssertEqual(health.status, "here")
        }
    }

    func testALongConversation() async throws {
        let server = try FakeServer { _ in FakeServer.json(200, Samples.answer) }
        let text = String(repeating: "long ", count: 400_000)
        _ = try await client(server).chat([.user(text)])
        XCTAssertGreaterThan(server.requests[0].body.count, text.utf8.count)
    }

    func testErrors() async throws {
        let body = #"{"error": {"message": "why", "type": "t", "param": "top_p", "code": null}}"#
        let answers: [(Int, String, LLMCadError)] = [
            (400, "", .badRequest(message: "why", param: "top_p")),
            (401, "WWW-Authenticate: Bearer\r\n", .unauthorized(message: "why")),
            (429, "Retry-After: 3\r\n", .queueFull(retryAfter: 3)),
            (503, "", .serverUnavailable(message: "why")),
            (307, "Location: http://127.0.0.1:1/\r\n", .unexpectedStatus(307, message: "why")),
        ]
        for (status, headers, expected) in answers {
            let server = try FakeServer { _ in FakeServer.json(status, body, headers: headers) }
            let client = client(server, key: "a-secret-key")
            let ofChat = await llmcadError { try await client.chat([.user("Hi")]) }
            XCTAssertEqual(ofChat, expected)
            let ofStream = await llmcadError { try await texts(client.stream([.user("Hi")])) }
            XCTAssertEqual(ofStream, expected)
        }
    }

    func testAnAnswerThatIsNotTheAPIs() async throws {
        let server = try FakeServer { _ in FakeServer.json(200, #"{"id": 5}"#) }
        let error = await llmcadError { try await client(server).chat([.user("Hi")]) }
        guard case .malformedResponse = error else { return XCTFail("\(String(describing: error))") }
    }

    func testAStreamThatBreaksOff() async throws {
        let server = try FakeServer { _ in [FakeServer.streamHead, .send(Samples.stream[0])] }
        let error = await llmcadError { try await texts(client(server).stream([.user("Hi")])) }
        XCTAssertEqual(
            error, .connection(.networkConnectionLost, message: "it was closed before the answer was complete")
        )
    }

    func testNothingListens() async throws {
        let port = try LoopbackPort.free()
        let client = LLMCadClient(endpoint: try XCTUnwrap(URL(string: "http://127.0.0.1:\(port)")))
        let error = await llmcadError { try await client.health() }
        guard case .connection(.cannotConnectToHost, _) = error else {
            return XCTFail("\(String(describing: error))")
        }
    }

    func testASilentServerTimesOut() async throws {
        let server = try FakeServer { _ in [.awaitDisconnect] }
        let error = await llmcadError { try await client(server, timeout: 1).chat([.user("Hi")]) }
        guard case .connection(.timedOut, _) = error else { return XCTFail("\(String(describing: error))") }
    }

    func testAnEndpointThatIsNoAddress() async throws {
        for text in ["mac.local:8080", "ftp://mac.local", "http:///x", "file:///tmp"] {
            let client = LLMCadClient(endpoint: try XCTUnwrap(URL(string: text)))
            let error = await llmcadError { try await client.health() }
            XCTAssertEqual(error, .invalidEndpoint(text))
        }
    }

    func testAnOptionThatJSONCannotHold() async throws {
        let server = try FakeServer { _ in FakeServer.json(200, Samples.answer) }
        let error = await llmcadError {
            try await client(server).chat([.user("Hi")], options: ChatOptions(temperature: .infinity))
        }
        XCTAssertEqual(error, .badRequest(message: "an option is not a finite number", param: nil))
        XCTAssertEqual(server.requests.count, 0)
    }
}
#endif
