"""This library in other people's frameworks; each module here needs its framework, and nothing else imports it."""
