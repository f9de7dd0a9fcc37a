"""How a frozen prefix is provided: resident, streamed or from the activation store."""
