#if os(macOS) || os(Linux)
import Foundation

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// Ports of 127.0.0.1.
enum LoopbackPort {
    /// A port that nothing listens on now.
    static func free() throws -> Int {
        guard let (descriptor, port) = listener(on: 0) else {
            throw LLMCadServerError.noFreePort
        }
        close(descriptor)
        return port
    }

    /// Whether nothing listens on `port` now.
    static func isFree(_ port: Int) -> Bool {
        guard let (descriptor, _) = listener(on: port) else { return false }
        close(descriptor)
        return true
    }

    /// A listening socket on `port`, or on any for 0, and its port; `nil` when it cannot be had.
    static func listener(on port: Int) -> (descriptor: Int32, port: Int)? {
        guard let number = in_port_t(exactly: port) else { return nil }
        let descriptor = socket(AF_INET, streamSocket, 0)
        guard descriptor >= 0 else { return nil }
        // A port whose last connections are still being forgotten may be listened on again.
        var reuse: Int32 = 1
        setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &reuse, socklen_t(MemoryLayout.size(ofValue: reuse)))
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = number.bigEndian
        address.sin_addr.s_addr = in_addr_t(INADDR_LOOPBACK).bigEndian
        var length = socklen_t(MemoryLayout.size(ofValue: address))
        let listens = withUnsafeMutablePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                bind(descriptor, address, length) == 0 && listen(descriptor, 16) == 0
                    && getsockname(descriptor, address, &length) == 0
            }
        }
        guard listens else {
            close(descriptor)
            return nil
        }
        return (descriptor, Int(in_port_t(bigEndian: address.sin_port)))
    }

    #if canImport(Glibc)
    private static let streamSocket = Int32(SOCK_STREAM.rawValue)
    #else
    private static let streamSocket = SOCK_STREAM
    #endif
}
#endif
