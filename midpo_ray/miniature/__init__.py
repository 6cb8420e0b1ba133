"""The demonstration: a generated world with known reward and cost, and a small base model."""
