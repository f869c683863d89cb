import Foundation

/// Splits the bytes of a `text/event-stream` into the data of its events.
///
/// Bytes may come cut anywhere, inside a character too. Comments and fields other than `data` are left out; an event
/// that is not ended by an empty line is not complete and never returned.
struct ServerSentEvents {
    /// Longest line that is kept; a round of 4096 nodes takes about 0.5 MB.
    static let maximumLineBytes = 16 << 20

    private var line = Data()
    private var data: [String] = []
    private var endedWithCarriageReturn = false

    /// The data of the events that `bytes` completes.
    ///
    /// - Throws: ``LLMCadError/malformedResponse(_:)`` for a line that does not end or is not UTF-8.
    mutating func append(_ bytes: Data) throws -> [String] {
        var events: [String] = []
        var rest = bytes[...]
        while !rest.isEmpty {
            if endedWithCarriageReturn {
                endedWithCarriageReturn = false
                if rest.first == UInt8(ascii: "\n") {
                    rest = rest.dropFirst()
                    continue
                }
            }
            guard let end = rest.firstIndex(where: { $0 == UInt8(ascii: "\n") || $0 == UInt8(ascii: "\r") }) else {
                line.append(rest)
                break
            }
            line.append(rest[..<end])
            endedWithCarriageReturn = rest[end] == UInt8(ascii: "\r")
            rest = rest[(end + 1)...]
            if let event = try takeLine() {
                events.append(event)
            }
        }
        guard line.count <= Self.maximumLineBytes else {
            throw LLMCadError.malformedResponse("a line of more than \(Self.maximumLineBytes) bytes")
        }
        return events
    }

    /// The event that the line completes, if it is the empty one after data.
    private mutating func takeLine() throws -> String? {
        defer { line.removeAll(keepingCapacity: true) }
        if line.isEmpty {
            defer { data.removeAll() }
            return data.isEmpty ? nil : data.joined(separator: "\n")
        }
        guard let text = String(data: line, encoding: .utf8) else {
            throw LLMCadError.malformedResponse("a line that is not UTF-8")
        }
        let field = text.prefix { $0 != ":" }
        if field == "data" {
            var value = text.dropFirst(field.count + 1)
            if value.first == " " {
                value = value.dropFirst()
            }
            data.append(String(value))
        }
        return nil
    }
}
