// A user of etcd's official client: puts and gets until its standard input ends,
// then says what it did. One client with its defaults and all endpoints, shared by
// all goroutines, as a program that links it has; every request has a timeout.
//
//	client -endpoints http://127.0.0.1:2379,… -goroutines 20
//
// It prints "ready" when every goroutine has had a success, and at the end a line
// "requests <n>" and one line "failed <n> <operation>: <error>" for each kind of error.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"sort"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Ports differ from run to run; the same error is to be counted once.
var address = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+:\d+`)

type tally struct {
	sync.Mutex
	requests int
	failed   map[string]int
}

func (t *tally) add(operation string, err error) {
	t.Lock()
	defer t.Unlock()
	t.requests++
	if err != nil {
		text := address.ReplaceAllString(err.Error(), "ADDRESS")
		t.failed[operation+": "+strings.ReplaceAll(text, "\n", " ")]++
	}
}

func main() {
	endpoints := flag.String("endpoints", "127.0.0.1:2379", "comma separated")
	goroutines := flag.Int("goroutines", 20, "how many put and get")
	timeout := flag.Duration("timeout", 5*time.Second, "of every request")
	flag.Parse()

	client, err := clientv3.New(clientv3.Config{Endpoints: strings.Split(*endpoints, ",")})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer client.Close()

	stop := make(chan struct{})
	counts := &tally{failed: make(map[string]int)}
	var warm, done sync.WaitGroup
	for g := 0; g < *goroutines; g++ {
		warm.Add(1)
		done.Add(1)
		go func(g int) {
			defer done.Done()
			key := fmt.Sprintf("/rolling/%04d", g)
			request := func(n int) (string, error) {
				ctx, cancel := context.WithTimeout(context.Background(), *timeout)
				defer cancel()
				if n%2 == 0 {
					_, err := client.Put(ctx, key, fmt.Sprint(n))
					return "put", err
				}
				_, err := client.Get(ctx, key)
				return "get", err
			}
			cold := true
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				operation, err := request(n)
				counts.add(operation, err)
				if cold && err == nil {
					cold = false
					warm.Done()
				}
				if err != nil {
					// As a retry loop would; a member that is down refuses at once.
					time.Sleep(10 * time.Millisecond)
				}
			}
		}(g)
	}
	warm.Wait()
	fmt.Println("ready")

	// Whoever started this holds the other end: it ends when they do.
	_, _ = io.Copy(io.Discard, os.Stdin)
	close(stop)
	done.Wait()
	fmt.Println("requests", counts.requests)
	kinds := make([]string, 0, len(counts.failed))
	for kind := range counts.failed {
		kinds = append(kinds, kind)
	}
	sort.Strings(kinds)
	for _, kind := range kinds {
		fmt.Println("failed", counts.failed[kind], kind)
	}
}
