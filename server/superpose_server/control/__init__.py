"""What operators change: which adapter a domain names, and the default mix."""
