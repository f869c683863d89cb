#if os(macOS) || os(Linux)
import Foundation
import XCTest

@testable import LLMCad

#if canImport(Glibc)
import Glibc
#endif

/// An HTTP server on loopback that says exactly what a test wants, one answer per connection.
final class FakeServer: Sendable {
    struct Request: Sendable {
        /// The request line and the headers.
        let head: String
        let body: Data
    }

    enum Step: Sendable {
        case send(String)
        case pause(milliseconds: UInt32)
        case waitUntil(@Sendable () -> Bool)
        /// Waits until the client closes the connection.
        case awaitDisconnect
    }

    let url: URL
    private let descriptor: Int32
    private let gone = Locked(false)
    private let seen = Locked<[Request]>([])
    private let left = Locked<Int>(0)

    /// The requests so far.
    var requests: [Request] { seen.withLock { $0 } }
    /// How many clients closed their connection at `awaitDisconnect`.
    var disconnects: Int { left.withLock { $0 } }

    init(port: Int = 0, _ answer: @escaping @Sendable (Request) -> [Step]) throws {
        let listener = try XCTUnwrap(LoopbackPort.listener(on: port))
        descriptor = listener.descriptor
        url = try XCTUnwrap(URL(string: "http://127.0.0.1:\(listener.port)"))
        let (descriptor, gone, seen, left) = (descriptor, gone, seen, left)
        Thread {
            // Only this thread may close the socket: its number is then the next server's.
            defer { close(descriptor) }
            while true {
                var waiting = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
                let ready = poll(&waiting, 1, 50)
                if gone.withLock({ $0 }) { return }
                guard ready > 0 else { continue }
                let client = accept(descriptor, nil, nil)
                guard client >= 0 else { return }
                Thread {
                    Self.serve(client, seen, left, answer)
                    close(client)
                }.start()
            }
        }.start()
    }

    deinit {
        gone.withLock { $0 = true }
        shutdown(descriptor, Int32(SHUT_RDWR))
    }

    /// An answer with a JSON body.
    static func json(_ status: Int, _ body: String, headers: String = "") -> [Step] {
        [
            .send(
                "HTTP/1.1 \(status) X\r\nContent-Type: application/json\r\nContent-Length: \(body.utf8.count)\r\n\(headers)\r\n"
            ),
            .send(body),
        ]
    }

    /// The head of a stream of events; the body ends with the connection.
    static let streamHead = Step.send(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")

    private static func serve(
        _ client: Int32, _ seen: Locked<[Request]>, _ left: Locked<Int>, _ answer: (Request) -> [Step]
    ) {
        guard let request = read(client) else { return }
        seen.withLock { $0.append(request) }
        for step in answer(request) {
            switch step {
            case .send(let text):
                reply(client, text)
            case .pause(let milliseconds):
                usleep(milliseconds * 1000)
            case .waitUntil(let condition):
                while !condition() { usleep(1000) }
            case .awaitDisconnect:
                var byte: UInt8 = 0
                while recv(client, &byte, 1, 0) > 0 {}
                left.withLock { $0 += 1 }
            }
        }
    }

    private static func read(_ client: Int32) -> Request? {
        var received = Data()
        var buffer = [UInt8](repeating: 0, count: 65536)
        while true {
            if let end = received.range(of: Data("\r\n\r\n".utf8)) {
                let head = String(decoding: received[..<end.lowerBound], as: UTF8.self)
                let length = head.lowercased().split(separator: "\r\n").first {
                    $0.hasPrefix("content-length:")
                }
                .flatMap { Int($0.dropFirst("content-length:".count).trimmingCharacters(in: .whitespaces)) }
                let body = received[end.upperBound...]
                if body.count >= length ?? 0 { return Request(head: head, body: Data(body)) }
            }
            let count = recv(client, &buffer, buffer.count, 0)
            guard count > 0 else { return nil }
            received.append(contentsOf: buffer[..<count])
        }
    }

    private static func reply(_ client: Int32, _ text: String) {
        #if os(Linux)
        let flags = Int32(MSG_NOSIGNAL)
        #else
        let flags: Int32 = 0
        var on: Int32 = 1
        setsockopt(client, SOL_SOCKET, SO_NOSIGPIPE, &on, socklen_t(MemoryLayout.size(ofValue: on)))
        #endif
        let bytes = Array(text.utf8)
        _ = send(client, bytes, bytes.count, flags)
    }
}

/// Waits until something becomes true; fails the test after a generous time.
func eventually(
    _ what: String, file: StaticString = #filePath, line: UInt = #line, _ condition: () async throws -> Bool
) async rethrows {
    for _ in 0..<600 {
        if try await condition() { return }
        try? await Task.sleep(for: .milliseconds(50))
    }
    XCTFail("never: \(what)", file: file, line: line)
}

/// The error that `body` throws, which must be an ``LLMCadError``.
func llmcadError<Value>(_ body: () async throws -> Value) async -> LLMCadError? {
    do {
        _ = try await body()
        return nil
    } catch {
        return error as? LLMCadError
    }
}
#endif
