"""What goes to the Hub: the card, the files, and when they are sent."""
