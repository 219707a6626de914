"""`miro inspect`: what a dataset folder holds, in numbers and pictures."""
