"""What tests share: the services they run on, and ways to wait for a condition with a bound."""
