package reboot

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// facts is what a pod tells of itself.
type facts struct {
	same  map[string]string // equal for as long as the processes live
	grows map[string]int64  // never smaller, and larger after a while
}

// after compares what a pod told before its container's end with what it tells now.
func (f facts) after(before facts) error {
	for k, v := range before.same {
		if f.same[k] != v {
			return fmt.Errorf("%s is %q, it was %q", k, f.same[k], v)
		}
	}
	for k, v := range before.grows {
		if f.grows[k] < v {
			return fmt.Errorf("%s is %d, it was %d", k, f.grows[k], v)
		}
	}
	return nil
}

// goesOn says whether each number has grown.
func (f facts) goesOn(before facts) error {
	for k, v := range before.grows {
		if f.grows[k] <= v {
			return fmt.Errorf("%s stands at %d", k, v)
		}
	}
	return f.after(before)
}

// workload is a pod, and how it is asked.
type workload struct {
	name       string
	light      bool // one of those that only make the number
	cold       bool // not opted in: begins anew
	key        string
	containers []container
	more       string // lines of the pod's spec
	policy     string
	// ask gets the pod's own facts over the network; nil where the log tells all.
	ask func(ctx context.Context, n *node, ip string) (facts, error)
	// tell gives the pod something to remember.
	tell func(ctx context.Context, n *node, ip, token string) error
}

type container struct {
	name, image string
	command     []string
	counts      bool // writes "count N" to its log, beginning with 1
	more        string
}

const tick = `while :; do n=$((n+1)); echo "count $n"; sleep 3; done`

func counter(name string) container {
	return container{name: name, image: "busybox", command: []string{"sh", "-c", "n=0; " + tick}, counts: true}
}

// serve is an HTTP server in so few modules that an emulated processor has
// compiled them in seconds. It answers with what facts returns, and keeps the
// body of a PUT in told.
const serve = `
import _socket, _thread, os, time
told = [""]
def serve(facts):
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    listener.bind(("", 8080))
    listener.listen(16)
    while True:
        c = _socket.socket(fileno=listener._accept()[0])
        try:
            c.settimeout(20)
            request = b""
            while b"\r\n\r\n" not in request:
                more = c.recv(4096)
                if not more: break
                request += more
            head, _, body = request.partition(b"\r\n\r\n")
            if head.startswith(b"PUT"):
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                while len(body) < length: body += c.recv(4096)
                told[0] = body.decode()
            answer = facts().encode()
            c.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        except OSError: pass
        c.close()
def line(kind, name, value): return "%s %s=%s\n" % (kind, name, value)
instance = os.urandom(8).hex()
`

const threads = serve + `
counters = [0] * 4
def count(i):
    while True:
        counters[i] += 1
        time.sleep(1)
def facts():
    return line("same", "instance", instance) + line("same", "told", told[0]) + "".join(line("grows", "thread %d" % i, n) for i, n in enumerate(counters))
for i in range(len(counters)): _thread.start_new_thread(count, (i,))
serve(facts)
`

// clocks watches the clocks that a kernel counts from its boot: whether one
// goes back, whether timers and sleeps end.
const clocks = serve + `
back, longest = {"monotonic": 0, "boottime": 0}, {"monotonic": 0, "boottime": 0}
grows = {"timerfd": 0, "sleeps": 0, "long sleeps": 0}
ids = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
def watch():
    last = {k: time.clock_gettime(i) for k, i in ids.items()}
    while True:
        for k, i in ids.items():
            now = time.clock_gettime(i)
            back[k] += now < last[k]
            longest[k] = max(longest[k], now - last[k])
            last[k] = now
        grows["sleeps"] += 1
        time.sleep(1)
def timer():
    fd = os.timerfd_create(time.CLOCK_BOOTTIME)
    os.timerfd_settime(fd, initial=1, interval=1)
    while True: grows["timerfd"] += int.from_bytes(os.read(fd, 8), "little")
def long_sleep():
    while True:
        time.sleep(45)
        grows["long sleeps"] += 1
def facts():
    return (line("same", "instance", instance) + "".join(line("same", k + " went back", n) for k, n in back.items())
        + "".join(line("grows", k, n) for k, n in grows.items()) + "".join(line("longest", k, n) for k, n in longest.items())
        + "".join(line("grows", k, int(1000 * time.clock_gettime(i))) for k, i in ids.items()))
for f in watch, timer, long_sleep: _thread.start_new_thread(f, ())
serve(facts)
`

const nginxConf = `user www-data; worker_processes 2; pid /run/nginx.pid; error_log /dev/stderr;
events { worker_connections 64; }
http { access_log off; server { listen 80; add_header X-Worker $pid;
	location /status { stub_status; } location / { return 200 "hello\n"; } } }`

// memory is a program that holds so many MiB.
const memory = serve + `
import sys
data = bytearray(os.urandom(1 << 20)) * int(sys.argv[1])
def facts(): return line("same", "instance", instance) + line("same", "told", told[0]) + line("same", "sum", sum(data[::1021]))
serve(facts)
`

// holding is a pod with so many MiB in memory.
func holding(name string, mib int) workload {
	return workload{name: name, policy: "reboot", containers: []container{{name: "python", image: "python",
		command: []string{"python3", "-I", "-S", "-c", memory, strconv.Itoa(mib)}}}, ask: askPython, tell: put("http://%s:8080/")}
}

// kinds is one pod of each kind.
func kinds() []workload {
	return []workload{
		{name: "counter", policy: "reboot", containers: []container{counter("c")},
			more: `  initContainers:
  - {name: init, image: "127.0.0.1:5000/busybox:latest", imagePullPolicy: IfNotPresent, command: [sh, -c, "echo made >>/made/by-init"], volumeMounts: [{name: made, mountPath: /made}]}
  volumes: [{name: made, emptyDir: {}}]
`},
		{name: "redis", policy: "reboot", containers: []container{{name: "redis", image: "redis",
			command: []string{"redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data", "--hz", "1"}}}, ask: askRedis, tell: tellRedis},
		{name: "nginx", policy: "reboot", containers: []container{{name: "nginx", image: "nginx",
			command: []string{"sh", "-c", "echo '" + nginxConf + "' >/etc/nginx/nginx.conf; exec nginx -g 'daemon off;'"},
			more:    "    livenessProbe: {httpGet: {path: /, port: 80}, initialDelaySeconds: 60, periodSeconds: 20, timeoutSeconds: 20}\n"}},
			ask: askNginx},
		{name: "java", policy: "reboot", containers: []container{{name: "java", image: "java", command: []string{"/opt/java/bin/java",
			"-Xshare:auto", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx64m", "-Dwarm.megabytes=16", "-cp", "/opt/java/classes", "Warm"}}},
			ask: askJava, tell: put("http://%s:8080/token")},
		{name: "threads", policy: "reboot", containers: []container{{name: "python", image: "python", command: []string{"python3", "-I", "-S", "-c", threads}}},
			ask: askPython, tell: put("http://%s:8080/")},
		{name: "clocks", policy: "reboot", containers: []container{{name: "python", image: "python", command: []string{"python3", "-I", "-S", "-c", clocks}}}, ask: askPython},
		{name: "pair", policy: "reboot", containers: []container{
			{name: "writer", image: "busybox", counts: true, more: sharedMount,
				command: []string{"sh", "-c", `n=0; while :; do n=$((n+1)); echo $n >/shared/n; echo "count $n"; sleep 3; done`}},
			// Ends with a line that says so where the file of the other is older than it was.
			{name: "reader", image: "busybox", counts: true, more: sharedMount,
				command: []string{"sh", "-c", `n=0; last=0; while :; do m=$(cat /shared/n 2>/dev/null); m=${m:-$last}; [ $m -ge $last ] || echo "lost: $m after $last"; last=$m; n=$((n+1)); echo "count $n"; sleep 3; done`}}},
			more: "  volumes: [{name: shared, emptyDir: {medium: Memory}}]\n"},
		{name: "set-0", policy: "resume", key: "set-0", containers: []container{counter("c")}},
		// Heeds SIGTERM, for systemd waits 90 s for who does not.
		{name: "ordinary", cold: true, containers: []container{{name: "c", image: "busybox", counts: true,
			command: []string{"sh", "-c", "trap 'exit 3' TERM; n=0; " + tick}}}},
	}
}

const sharedMount = "    volumeMounts: [{name: shared, mountPath: /shared}]\n"

// workloads is n pods: one of each kind, the rest light ones; or, with MB, so
// many that hold memory.
func workloads(t *testing.T, n int) []workload {
	all := kinds()
	if mib := envInt(t, "MB", 0); mib > 0 {
		for i := range all {
			all[i] = holding(fmt.Sprintf("memory-%d", i), mib)
		}
	}
	if n > 0 && n < len(all) {
		all = all[:n]
	}
	for i := len(all); i < n; i++ {
		all = append(all, workload{name: fmt.Sprintf("light-%d", i), light: true, policy: "reboot", containers: []container{counter("c")}})
	}
	return all
}

// uid is fixed by the pod's name and generation, as a pod's is in an API server.
func (w workload) uid(generation int) string {
	h := sha256.Sum256(fmt.Append(nil, w.name, generation))
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

func (w workload) manifest(generation int) string {
	var b strings.Builder
	quote := func(v any) string { j, _ := json.Marshal(v); return string(j) }
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  namespace: default\n  uid: %s\n", w.name, w.uid(generation))
	notes := map[string]string{}
	if w.policy != "" {
		notes["stasis.dev/policy"] = w.policy
	}
	if w.key != "" {
		notes["stasis.dev/key"] = w.key
	}
	fmt.Fprintf(&b, "  annotations: %s\nspec:\n  terminationGracePeriodSeconds: 30\n%s  containers:\n", quote(notes), w.more)
	for _, c := range w.containers {
		// The request gives the pods a share of the one processor that the node's own services leave them.
		fmt.Fprintf(&b, "  - name: %s\n    image: 127.0.0.1:5000/%s:latest\n    imagePullPolicy: IfNotPresent\n    resources: {requests: {cpu: 40m}}\n%s", c.name, c.image, c.more)
		if c.command != nil {
			fmt.Fprintf(&b, "    command: %s\n", quote(c.command))
		}
	}
	return b.String()
}

func token() string { return rand.Text() }

func (n *node) get(ctx context.Context, url string) (string, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", nil, err
	}
	return do(n.client, req)
}

func do(client *http.Client, req *http.Request) (string, http.Header, error) {
	resp, err := client.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s: %s", req.URL, resp.Status, b)
	}
	return string(b), resp.Header, err
}

func put(url string) func(ctx context.Context, n *node, ip, token string) error {
	return func(ctx context.Context, n *node, ip, token string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf(url, ip), strings.NewReader(token))
		if err != nil {
			return err
		}
		_, _, err = do(n.client, req)
		return err
	}
}

func askPython(ctx context.Context, n *node, ip string) (facts, error) {
	f := facts{map[string]string{}, map[string]int64{}}
	body, _, err := n.get(ctx, "http://"+ip+":8080/")
	if err != nil {
		return f, err
	}
	for _, line := range strings.Split(body, "\n") {
		kind, line, _ := strings.Cut(line, " ")
		name, value, _ := strings.Cut(line, "=")
		switch kind {
		case "same":
			f.same[name] = value
		case "grows":
			if f.grows[name], err = strconv.ParseInt(value, 10, 64); err != nil {
				return f, err
			}
		case "longest":
			n.log("clocks: the longest step of %s was %s s", name, value)
		}
	}
	return f, nil
}

func askJava(ctx context.Context, n *node, ip string) (f facts, err error) {
	body, _, err := n.get(ctx, "http://"+ip+":8080/")
	if err != nil {
		return f, err
	}
	words := strings.Fields(body) // instance, start, ticks, ballast
	if len(words) != 4 {
		return f, fmt.Errorf("the JVM answers %q", body)
	}
	ticks, err := strconv.ParseInt(words[2], 10, 64)
	if err != nil {
		return f, err
	}
	told, _, err := n.get(ctx, "http://"+ip+":8080/token")
	return facts{map[string]string{"instance": words[0], "started": words[1], "told": told}, map[string]int64{"ticks": ticks}}, err
}

var requests = regexp.MustCompile(`\n (\d+) (\d+) (\d+) `)

// askNginx: how many requests there were stands in memory that the workers
// share. The facts hold the processes that answer.
func askNginx(ctx context.Context, n *node, ip string) (f facts, err error) {
	workers := map[string]bool{}
	for range 3 {
		_, header, err := n.get(ctx, "http://"+ip+"/")
		if err != nil {
			return f, err
		}
		workers[header.Get("X-Worker")] = true
	}
	body, _, err := n.get(ctx, "http://"+ip+"/status")
	if err != nil {
		return f, err
	}
	m := requests.FindStringSubmatch(body)
	if m == nil {
		return f, fmt.Errorf("nginx answers %q", body)
	}
	count, err := strconv.ParseInt(m[3], 10, 64)
	n.log("nginx: workers %v, %d requests", slices.Sorted(maps.Keys(workers)), count)
	return facts{nil, map[string]int64{"requests": count}}, err
}

// redisCommands sends inline commands and returns the last answer.
func redisCommands(ctx context.Context, n *node, ip string, commands ...string) (answer string, err error) {
	c, err := n.dial(ctx, ip+":6379")
	if err != nil {
		return "", err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for _, command := range commands {
		fmt.Fprintf(c, "%s\r\n", command)
		if answer, err = r.ReadString('\n'); err != nil {
			return "", fmt.Errorf("redis: %w", err)
		}
		if size, ok := strings.CutPrefix(strings.TrimSpace(answer), "$"); ok {
			length, err := strconv.Atoi(size)
			if err != nil || length > 1<<20 {
				return "", fmt.Errorf("redis answers %q", answer)
			}
			if length < 0 {
				answer = ""
				continue
			}
			b := make([]byte, length+2)
			if _, err := io.ReadFull(r, b); err != nil {
				return "", fmt.Errorf("redis: %w", err)
			}
			answer = string(b[:length])
		}
	}
	return answer, nil
}

var runID = regexp.MustCompile(`run_id:(\w+)`)

func askRedis(ctx context.Context, n *node, ip string) (f facts, err error) {
	told, err := redisCommands(ctx, n, ip, "GET token")
	if err != nil {
		return f, err
	}
	info, err := redisCommands(ctx, n, ip, "INFO server")
	if err != nil {
		return f, err
	}
	m := runID.FindStringSubmatch(info)
	if m == nil {
		return f, fmt.Errorf("redis answers %q", info)
	}
	visits, err := redisCommands(ctx, n, ip, "INCR visits")
	if err != nil {
		return f, err
	}
	count, err := strconv.ParseInt(strings.Trim(visits, ":\r\n"), 10, 64)
	return facts{map[string]string{"run_id": m[1], "told": told}, map[string]int64{"visits": count}}, err
}

func tellRedis(ctx context.Context, n *node, ip, token string) error {
	answer, err := redisCommands(ctx, n, ip, "SET token "+token)
	if err == nil && !strings.HasPrefix(answer, "+OK") {
		err = fmt.Errorf("redis answers %q", answer)
	}
	return err
}
