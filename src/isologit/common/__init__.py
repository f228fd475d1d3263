"""What several rooms share and none of them owns. Knows no room."""
