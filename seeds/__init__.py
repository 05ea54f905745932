"""What an audit starts from: models made ready, and a demo corpus whose leaks are known."""
