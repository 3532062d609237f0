"""`ensadv-fast bench`: every op beside what one would write without it."""
