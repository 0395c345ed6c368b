"""The demo model's world: coloured shapes on plain backgrounds, how it is learned and how it is scored."""
