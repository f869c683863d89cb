import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// What an HTTP answer brings, in order: one head, then pieces of the body.
enum HTTPPart: Sendable {
    case head(HTTPURLResponse)
    case body(Data)
}

/// One request and its answer, piece by piece as it arrives.
///
/// `URLSession.bytes(for:)` does not exist on Linux; a delegate does on every platform. Each request has a session of
/// its own: a kept connection that the server closed meanwhile would fail a request that was never sent.
final class HTTPExchange: NSObject, URLSessionDataDelegate {
    typealias Parts = AsyncThrowingStream<HTTPPart, any Error>

    private let continuation: Parts.Continuation

    private init(_ continuation: Parts.Continuation) {
        self.continuation = continuation
    }

    /// Sends `request`. Ending the iteration, or cancelling its task, closes the connection at once.
    ///
    /// The stream throws ``LLMCadError/connection(_:message:)``, or `CancellationError` when it was closed.
    static func start(_ request: URLRequest) -> Parts {
        let (parts, continuation) = Parts.makeStream()
        let configuration = URLSessionConfiguration.ephemeral
        configuration.urlCache = nil
        configuration.httpCookieStorage = nil
        configuration.timeoutIntervalForRequest = request.timeoutInterval
        let exchange = HTTPExchange(continuation)
        let session = URLSession(configuration: configuration, delegate: exchange, delegateQueue: nil)
        let task = session.dataTask(with: request)
        continuation.onTermination = { _ in task.cancel() }
        task.resume()
        return parts
    }

    func urlSession(
        _ session: URLSession,
        dataTask: URLSessionDataTask,
        didReceive response: URLResponse,
        completionHandler: @escaping @Sendable (URLSession.ResponseDisposition) -> Void
    ) {
        if let response = response as? HTTPURLResponse {
            continuation.yield(.head(response))
        }
        completionHandler(.allow)
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        continuation.yield(.body(data))
    }

    func urlSession(
        _ session: URLSession,
        task: URLSessionTask,
        willPerformHTTPRedirection response: HTTPURLResponse,
        newRequest request: URLRequest,
        completionHandler: @escaping @Sendable (URLRequest?) -> Void
    ) {
        completionHandler(nil)  // The API never redirects, and the key must not travel to another host.
    }

    func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
        // Only a reader who has gone cancels the task, and the reader may see this first.
        let cancelled = (error as? URLError)?.code == .cancelled
        continuation.finish(throwing: cancelled ? CancellationError() : error.map { LLMCadError(transport: $0) })
        session.finishTasksAndInvalidate()  // A session holds its delegate until then.
    }
}
