"""A teacher behind a server: what serves it (`server`), who asks it (`client`), and what travels between them (`wire`)."""
