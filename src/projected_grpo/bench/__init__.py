"""Speed, each thing against its peer in one process, in turn: a ratio says something on a shared machine, a number of
seconds does not."""
