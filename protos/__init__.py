"""The contract of both sides: messages, encodings, keys. No torch in here."""
