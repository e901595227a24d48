"""All settings: frozen dataclasses, built once, unknown keys refused. Defaults stand only here."""
