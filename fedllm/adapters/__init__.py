"""What an adapter is: layout, state, factored algebra and the folder it is published in."""
