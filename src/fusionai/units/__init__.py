"""Units, and what people write and read: durations, amounts of memory, addresses."""
