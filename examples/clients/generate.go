// An image with Go's standard library: go run generate.go PROMPT FILE
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
)

type answer struct {
	Data []struct {
		Image []byte `json:"b64_json"` // encoding/json decodes base64
		Seed  int64  `json:"seed"`
	} `json:"data"`
	Error struct {
		Message string `json:"message"`
	} `json:"error"`
}

func generate(url, key, prompt string) (*answer, error) {
	body, err := json.Marshal(map[string]any{"prompt": prompt, "seed": 7, "response_format": "b64_json"})
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequest(http.MethodPost, url+"/v1/images/generations", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	if key != "" {
		request.Header.Set("Authorization", "Bearer "+key)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var made answer
	if err := json.NewDecoder(response.Body).Decode(&made); err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", response.Status, made.Error.Message)
	}
	return &made, nil
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: go run generate.go PROMPT FILE")
		os.Exit(2)
	}
	url := os.Getenv("TRIPTYCH_URL")
	if url == "" {
		url = "http://127.0.0.1:8000"
	}
	made, err := generate(url, os.Getenv("TRIPTYCH_API_KEY"), os.Args[1])
	if err == nil {
		err = os.WriteFile(os.Args[2], made.Data[0].Image, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%s, seed %d\n", os.Args[2], made.Data[0].Seed)
}
