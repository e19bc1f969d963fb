"""Speed of recaption, and the cost of resuming it."""
