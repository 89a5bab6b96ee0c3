"""The commands of `sdkit`, one a file."""
