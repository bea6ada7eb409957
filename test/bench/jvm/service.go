package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var pageSize = int64(os.Getpagesize())

// service is what runs in a container and answers on port 8080.
type service struct {
	name, short string // for people, and as part of names
	image       string
	command     []string
	path        string // of questions, with a verb for their number; without one there is one question
}

// questions is how many different questions there are.
const questions = 1000

func (s service) question(i int) string {
	if !strings.Contains(s.path, "%") {
		return s.path
	}
	return fmt.Sprintf(s.path, i)
}

// floor is a container with next to nothing in it.
func floor() service {
	return service{name: "floor", short: "floor", image: "busybox", path: "/hostname",
		command: []string{"busybox", "httpd", "-f", "-p", "8080", "-h", "/etc"}}
}

// tomcat makes pages with a JSP and a servlet's cache.
func tomcat() service {
	return service{name: "tomcat", short: "tomcat", image: "tomcat", path: "/index.jsp?n=%d"}
}

// warm looks at 32 pages of a heap of so many megabytes for each answer.
func warm(mb int) service {
	return service{name: fmt.Sprintf("heap of %d MB", mb), short: fmt.Sprintf("heap-%d", mb), image: "java", path: "/peek/%d",
		// Without nodelay the server waits for the client before it sends an answer's body.
		command: []string{"/opt/java/bin/java", "-Dsun.net.httpserver.nodelay=true", "-XX:+UseSerialGC", "-Xmn32m", fmt.Sprintf("-Xmx%dm", mb+96),
			fmt.Sprintf("-Dwarm.megabytes=%d", mb), "-cp", "/opt/java/classes", "Warm"}}
}

// get asks one question.
func get(ctx context.Context, c *http.Client, address, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, resp.Status)
	}
	return string(b), err
}

// errWrong is an answer that the source of the template would not have given.
var errWrong = errors.New("wrong answer")

func check(path, got string, answers map[string]string) error {
	if want, ok := answers[path]; ok && got != want {
		return fmt.Errorf("%s: %w: %.100q, want %.100q", path, errWrong, got, want)
	}
	return nil
}

// firstAnswer asks again every two milliseconds until there is an answer: more often
// takes time from those who are asked.
func (s service) firstAnswer(ctx context.Context, address string, answers map[string]string) (time.Time, error) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	path := s.question(0)
	for {
		got, err := get(ctx, c, address, path)
		now := time.Now()
		if err == nil {
			return now, check(path, got, answers)
		}
		select {
		case <-ctx.Done():
			return now, fmt.Errorf("no answer: %w", err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// warmUp asks every question several times and notes the answers.
func (s service) warmUp(ctx context.Context, address string, answers map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	// No connection may be open at the dump.
	t := &http.Transport{}
	defer t.CloseIdleConnections()
	for range 3 {
		for i := range questions {
			path := s.question(i)
			got, err := get(ctx, &http.Client{Transport: t}, address, path)
			if err == nil {
				err = check(path, got, answers)
			}
			if err != nil {
				return err
			}
			answers[path] = got
		}
	}
	return nil
}

// request is when a request was due after the first answer, and how long after
// that its answer came.
type request struct{ due, took time.Duration }

// after sends requests at a fixed rate for a while, however long the answers
// take, and watches memory meanwhile. A failed request is an error.
func (s service) after(ctx context.Context, address, container string, answers map[string]string, set settings) (rs []request, fill float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, set.Window+stepTimeout)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { fill = watchFill(ctx, container) })
	t := &http.Transport{MaxIdleConnsPerHost: set.Rate}
	defer t.CloseIdleConnections()
	c := &http.Client{Transport: t}
	var mu sync.Mutex // guards rs and err
	begin := time.Now()
	for i := range int(set.Window.Seconds() * float64(set.Rate)) {
		due := time.Duration(i) * time.Second / time.Duration(set.Rate)
		time.Sleep(time.Until(begin.Add(due)))
		wg.Go(func() {
			path := s.question(rand.IntN(questions))
			got, rerr := get(ctx, c, address, path)
			took := time.Since(begin) - due
			if rerr == nil {
				rerr = check(path, got, answers)
			}
			mu.Lock()
			defer mu.Unlock()
			rs = append(rs, request{due, took})
			if rerr != nil && err == nil {
				err = rerr
			}
		})
	}
	wg.Wait()
	return rs, fill, err
}

// watchFill looks at the resident memory of a container's process until it has
// not grown for a while, and returns by how many bytes a second it grew to 95 %
// of the end. It returns 0 where most memory was there at the beginning.
func watchFill(ctx context.Context, container string) float64 {
	pid := processOf(container)
	if pid == "" {
		return 0
	}
	type point struct {
		at  time.Time
		rss int64
	}
	var points []point
	grown := time.Now()
	for ctx.Err() == nil && time.Since(grown) < 300*time.Millisecond {
		b, err := os.ReadFile("/proc/" + pid + "/statm")
		if err != nil {
			return 0
		}
		var size, resident int64
		if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
			return 0
		}
		now := time.Now()
		if resident *= pageSize; len(points) == 0 || resident > points[len(points)-1].rss+1<<20 {
			points = append(points, point{now, resident})
			grown = now
		}
		time.Sleep(time.Millisecond)
	}
	if len(points) < 3 {
		return 0
	}
	first, last := points[0], points[len(points)-1]
	if first.rss > last.rss/2 {
		return 0
	}
	for _, p := range points {
		if p.rss-first.rss >= (last.rss-first.rss)*95/100 {
			return float64(p.rss-first.rss) / p.at.Sub(first.at).Seconds()
		}
	}
	return 0
}

// processOf is a process in the container's cgroup, empty if there is none.
func processOf(container string) string {
	names, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), container) {
			pid := filepath.Base(filepath.Dir(name))
			if _, err := strconv.Atoi(pid); err == nil {
				return pid
			}
		}
	}
	return ""
}

// cached counts the pages of a file in the page cache.
func cached(f *os.File, size int64) (pages int64, err error) {
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mmap %s: %w", f.Name(), err)
	}
	defer unix.Munmap(m)
	vec := make([]byte, (size+pageSize-1)/pageSize)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
		return 0, fmt.Errorf("mincore %s: %w", f.Name(), errno)
	}
	for _, v := range vec {
		pages += int64(v & 1)
	}
	return pages, nil
}
