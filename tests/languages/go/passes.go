package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
)

func main() {
	scanner := bufio.NewScanner(os.Stdin)
	scanner.Scan()
	sum := 0
	for _, word := range os.Args[1:] {
		number, _ := strconv.Atoi(word)
		sum += number
	}
	fmt.Println("Hello", scanner.Text(), sum)
}
