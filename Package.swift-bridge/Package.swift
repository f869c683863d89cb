// swift-tools-version: 6.0

import PackageDescription

let package = Package(
    name: "LLMCad",
    platforms: [.macOS(.v13), .iOS(.v16)],
    products: [
        .library(name: "LLMCad", targets: ["LLMCad"]),
        .executable(name: "llmcad-example", targets: ["llmcad-example"]),
    ],
    targets: [
        .target(name: "LLMCad"),
        .executableTarget(name: "llmcad-example", dependencies: ["LLMCad"]),
        .testTarget(name: "LLMCadTests", dependencies: ["LLMCad"]),
    ],
    swiftLanguageModes: [.v6]
)
