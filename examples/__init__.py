"""Projects built on the package, as a user would build them; the package never imports them."""
