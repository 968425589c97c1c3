"""This library in other frameworks. Each package here needs its framework, and only users import it."""
