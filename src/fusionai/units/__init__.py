"""Units as people write and read them: durations, amounts of memory, addresses."""
