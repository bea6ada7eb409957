// Package kubelet holds the tests with a real kubelet, standalone with static
// pods, in a test node whose default handler is stasis.
package kubelet

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/internal/testenv"
)

const (
	manifests = "/etc/kubernetes/manifests"
	api       = "https://127.0.0.1:10250"
	deadline  = 3 * time.Minute
)

const manifest = `apiVersion: v1
kind: Pod
metadata:
  name: counter
  namespace: default
  annotations: {stasis.dev/policy: resume}
spec:
  terminationGracePeriodSeconds: 30
  containers:
  - name: c
    image: 127.0.0.1:5000/busybox:latest
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'n=0; while :; do n=$((n+1)); echo "count $n"; sleep 0.1; done']
    volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes:
  - name: scratch
    emptyDir: {medium: Memory}
`

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	b, _ := os.ReadFile("/var/log/kubelet.log")
	if len(b) > 4000 {
		b = b[len(b)-4000:]
	}
	t.Fatalf("%s: %v\nkubelet: %s", what, err, b)
}

var countLine = regexp.MustCompile(`count (\d+)`)

// logs returns the counts in each of the pod's container logs, oldest attempt first.
func logs(t *testing.T) map[int][]int {
	t.Helper()
	names, _ := filepath.Glob("/var/log/pods/default_counter-node_*/c/*.log")
	sort.Strings(names)
	out := map[int][]int{}
	for _, name := range names {
		attempt, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(name), ".log"))
		if err != nil {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		for _, m := range countLine.FindAllStringSubmatch(string(b), -1) {
			n, _ := strconv.Atoi(m[1])
			out[attempt] = append(out[attempt], n)
		}
	}
	return out
}

func crictl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("crictl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("crictl %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestKubelet walks a static pod through what a kubelet does to it: start,
// checkpoint by its endpoint, restart of the container, removal and return of
// the pod. Its counter never begins anew.
func TestKubelet(t *testing.T) {
	testenv.Need(t, testenv.Root, testenv.CRIU, testenv.Runc, testenv.Node)
	if out, err := exec.Command("/src/test/node/kubelet").CombinedOutput(); err != nil {
		t.Fatalf("kubelet: %v\n%s", err, out)
	}
	put := func() {
		if err := os.WriteFile(filepath.Join(manifests, "counter.yaml"), []byte(manifest), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put()
	eventually(t, "the static pod", func() error {
		if n := logs(t)[0]; len(n) < 10 {
			return fmt.Errorf("%d lines of log", len(n))
		}
		return nil
	})
	container := crictl(t, "ps", "-q", "--name", "^c$")
	crictl(t, "exec", container, "sh", "-c", "echo vol >/scratch/f; echo shm >/dev/shm/f; echo root >/f")

	archive := checkpoint(t)
	out, err := exec.Command("checkpointctl", "show", archive).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "busybox") {
		t.Errorf("checkpointctl show: %v\n%s", err, out)
	}
	before := logs(t)[0]
	eventually(t, "the container running on after its checkpoint", func() error {
		if n := logs(t)[0]; len(n) <= len(before)+5 {
			return fmt.Errorf("%d lines of log, %d before", len(n), len(before))
		}
		return nil
	})

	// The kubelet restarts a container that stopped, in the same sandbox.
	crictl(t, "stop", "-t", "30", container)
	last := 0
	eventually(t, "restart of the container", func() error {
		l := logs(t)
		if len(l[1]) < 5 {
			return fmt.Errorf("%d lines in the log of attempt 1", len(l[1]))
		}
		old := l[0]
		last = l[1][len(l[1])-1]
		if l[1][0] != old[len(old)-1]+1 {
			t.Fatalf("attempt 1 begins with %d, attempt 0 ended with %d", l[1][0], old[len(old)-1])
		}
		return nil
	})
	t.Logf("restarted by the kubelet, at %d now", last)

	// The pod goes away and comes back: for a static pod under the same UID.
	if err := os.Remove(filepath.Join(manifests, "counter.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the pod", func() error {
		if out := crictl(t, "pods", "-q", "--name", "^counter-node$"); out != "" {
			for _, id := range strings.Fields(out) {
				if s := crictl(t, "inspectp", "-o", "go-template", "--template", "{{.status.state}}", id); s == "SANDBOX_READY" {
					return errors.New("the sandbox is still ready")
				}
			}
		}
		return nil
	})
	events, _ := os.ReadFile("/var/lib/stasis/events.jsonl")
	dumps := strings.Count(string(events), `"type":"dumped"`)
	if dumps < 2 {
		t.Fatalf("%d dumps after a restart and a removal:\n%s", dumps, events)
	}
	put()
	eventually(t, "the pod's return", func() error {
		id := crictl(t, "ps", "-q", "--name", "^c$", "--state", "running")
		if id == "" {
			return errors.New("no running container")
		}
		logs := crictl(t, "logs", id)
		m := countLine.FindStringSubmatch(logs)
		if m == nil {
			return errors.New("no line of log")
		}
		if n, _ := strconv.Atoi(m[1]); n <= last {
			t.Fatalf("the returned pod begins with %d, it had come to %d", n, last)
		}
		if got := crictl(t, "exec", id, "cat", "/scratch/f", "/dev/shm/f", "/f"); got != "vol\nshm\nroot" {
			t.Fatalf("files of the returned pod: %q", got)
		}
		return nil
	})
}

// checkpoint calls the kubelet's endpoint and returns the archive's path.
func checkpoint(t *testing.T) string {
	t.Helper()
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	resp, err := client.Post(api+"/checkpoint/default/counter-node/c", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	var answer struct{ Items []string }
	if err := json.Unmarshal(body, &answer); err != nil || resp.StatusCode != http.StatusOK || len(answer.Items) != 1 {
		t.Fatalf("checkpoint endpoint: %s: %s", resp.Status, body)
	}
	return answer.Items[0]
}
