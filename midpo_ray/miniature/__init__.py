"""The embedded demonstration: a generated world with known reward and cost, and a base model small enough for a laptop."""
