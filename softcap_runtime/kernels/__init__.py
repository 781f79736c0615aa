"""Keys, engines and the torch operator: how attention is computed, by what, and how it is compiled."""
