"""What an adapter may not change while it trains: `Confinement` and what it holds (`confinement`), `confine`, `oplora`."""
