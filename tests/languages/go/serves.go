package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "check" {
		fmt.Println("ok")
		return
	}
	http.HandleFunc("/", func(answer http.ResponseWriter, request *http.Request) {
		fmt.Fprint(answer, "served ", request.URL.Path)
	})
	panic(http.ListenAndServe(":3000", nil))
}
