package main

import "os"

func main() {
	os.Stderr.WriteString("about to fail\n")
	os.Exit(3)
}
