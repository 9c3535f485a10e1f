"""What tests of several folders share: a fault proxy, programs to run as processes."""
