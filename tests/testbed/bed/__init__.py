"""The parts of the test bed; tests/testbed/README.md says what each one is."""
