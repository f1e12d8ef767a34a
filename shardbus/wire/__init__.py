"""The wire protocol without a network in it: frames, the batch codec, and the two ends of a session."""
