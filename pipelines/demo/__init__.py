"""The whole path on one machine: the jobs one after the other, judged on scenes never seen."""
