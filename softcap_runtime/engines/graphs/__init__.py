"""What is exported for the packages of the flex engine, and the child process that compiles it."""
