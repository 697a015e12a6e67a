"""What the service promises when something goes wrong, tried with real processes; read __main__.py first."""
