"""What the tests need of a machine: throw-away servers, waiting, coverage inside backends."""
