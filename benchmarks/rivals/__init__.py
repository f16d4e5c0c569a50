"""The published ways to search, each written from its description, on layerskip's own decoding."""
