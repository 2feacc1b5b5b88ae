"""TileLang definitions: one op a file; a builder takes ints, returns a kernel, sees no tensor."""
