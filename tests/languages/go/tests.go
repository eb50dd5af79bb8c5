package main

import "testing"

func TestSum(t *testing.T) {
	if 2+2 != FOUR {
		t.Fatal("not FOUR")
	}
}
