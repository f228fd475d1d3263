"""What every numeric operation means. Knows no device and no request."""
