package reboot

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// node is the machine with its pods.
type node struct {
	*machine
	pods       []workload
	generation map[string]int
	api        *controlPlane // nil: the kubelet is on its own, and the pods are static
}

// newNode makes a machine that is off, with pods to run.
func newNode(t *testing.T, pods []workload) *node {
	t.Helper()
	n := &node{machine: newMachine(t), pods: pods, generation: map[string]int{}}
	if err := n.writeSeed(); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) log(format string, args ...any) {
	n.t.Helper()
	n.t.Logf("%4.0fs "+format, append([]any{time.Since(start).Seconds()}, args...)...)
}

var start = time.Now()

// Units that a test has no use for: servers whose packages the test images are
// made of, and periodic work.
var masked = []string{
	"getty.target", "serial-getty@ttyS0.service", "nginx.service", "redis-server.service", "docker-registry.service", "apt-daily.timer",
	"apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "nftables.service",
	"systemd-networkd.service", "systemd-networkd-wait-online.service",
}

// writeSeed makes the archive that the first boot unpacks over the root: the
// node's configuration, what `make install` has put into STASIS_INSTALLED, the
// agent, and the pods.
func (n *node) writeSeed() error {
	f, err := os.Create(n.seed)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	file := func(name string, mode int64, data []byte) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: start}); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	link := func(name, target string) error {
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: start})
	}
	// Directories are left as they are on the disk.
	directory := func(from string) error {
		return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			rel, err := filepath.Rel(from, name)
			if err != nil {
				return err
			}
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			mode := int64(0o644)
			if info, err := d.Info(); err == nil && info.Mode()&0o100 != 0 {
				mode = 0o755
			}
			if err := file(rel, mode, data); err != nil || filepath.Ext(name) != ".service" {
				return err
			}
			for _, m := range wantedBy.FindAllStringSubmatch(string(data), -1) {
				for _, target := range strings.Fields(m[2]) {
					dir := target + map[string]string{"Wanted": ".wants", "Required": ".requires"}[m[1]]
					if err := link("etc/systemd/system/"+dir+"/"+filepath.Base(name), "/"+rel); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	installed := os.Getenv("STASIS_INSTALLED")
	if installed == "" {
		return errors.New("STASIS_INSTALLED is not set: see test/reboot/run")
	}
	for _, dir := range []string{"node", installed} {
		if err := directory(dir); err != nil {
			return err
		}
	}
	for _, unit := range masked {
		if err := link("etc/systemd/system/"+unit, "/dev/null"); err != nil {
			return err
		}
	}
	if err := link("etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target"); err != nil {
		return err
	}
	if err := file("etc/machine-id", 0o444, fmt.Appendf(nil, "%032x\n", start.UnixNano())); err != nil {
		return err
	}
	if n.api != nil {
		if err := file("etc/kubernetes/kubelet.conf", 0o600, []byte(n.api.kubeconfig)); err != nil {
			return err
		}
		if err := file("etc/default/kubelet", 0o644, []byte("KUBELET_EXTRA_ARGS=--kubeconfig=/etc/kubernetes/kubelet.conf\n")); err != nil {
			return err
		}
		return w.Close()
	}
	for _, p := range n.pods {
		if err := file("etc/kubernetes/manifests/"+p.name+".yaml", 0o600, []byte(p.manifest(0))); err != nil {
			return err
		}
	}
	return w.Close()
}

var wantedBy = regexp.MustCompile(`(?m)^(Wanted|Required)By=(.*)$`)

// pod is what the kubelet says of one.
type pod struct {
	Metadata struct{ Name, UID string }
	Status   struct {
		Phase, PodIP      string
		ContainerStatuses []struct {
			Name         string
			RestartCount int
			ContainerID  string
			State        struct {
				Running *struct{ StartedAt time.Time }
			}
			LastState struct{ Terminated *struct{ ExitCode int } }
		}
	}
}

// ends are the first and the last count of one container's log, by attempt.
type ends struct{ first, last int64 }

// state is all that can be seen from outside.
type state struct {
	pods  map[string]pod
	logs  map[string]map[int]ends // by UID/container
	facts map[string]facts
	lost  []string // lines of logs that tell of a loss
}

// heads prints the first and the last line of each log, except of those that go meanwhile.
const heads = `cd /var/log/pods 2>/dev/null || exit 0
set -- */*/*.log; [ -e "$1" ] || exit 0
awk 'FNR==1 {if (l) print l; print "== " FILENAME; print} /lost:/ {print "!! " FILENAME " " $0} {l=$0} END {if (l) print l}' "$@" 2>/dev/null || :`

var (
	logName = regexp.MustCompile(`^== default_.+-node_(.+)/(.+)/(\d+)\.log$`)
	counted = regexp.MustCompile(`count (\d+)$`)
)

// look asks the kubelet, the logs and the pods. An error says what is not
// there yet.
func (n *node) look(ctx context.Context) (state, error) {
	s := state{pods: map[string]pod{}, logs: map[string]map[int]ends{}, facts: map[string]facts{}}
	out, err := n.sh(2*time.Minute, "curl -sk --max-time 100 https://127.0.0.1:10250/pods && echo && { "+heads+"\n}")
	if err != nil {
		return s, err
	}
	answer, logs, _ := strings.Cut(out, "\n")
	var list struct{ Items []pod }
	if err := json.Unmarshal([]byte(answer), &list); err != nil {
		return s, fmt.Errorf("the kubelet answers %.200q: %w", answer, err)
	}
	for _, p := range list.Items {
		s.pods[strings.TrimSuffix(p.Metadata.Name, "-node")] = p
	}
	var key string
	var attempt int
	for _, line := range strings.Split(logs, "\n") {
		if m := logName.FindStringSubmatch(line); m != nil {
			key = m[1] + "/" + m[2]
			attempt, _ = strconv.Atoi(m[3])
		} else if strings.HasPrefix(line, "!! ") {
			s.lost = append(s.lost, line)
		} else if m := counted.FindStringSubmatch(line); m != nil {
			if s.logs[key] == nil {
				s.logs[key] = map[int]ends{}
			}
			count, _ := strconv.ParseInt(m[1], 10, 64)
			e := s.logs[key][attempt]
			if e.first == 0 {
				e.first = count
			}
			e.last = count
			s.logs[key][attempt] = e
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var missing []string
	for _, w := range n.pods {
		p := s.pods[w.name]
		f := facts{map[string]string{}, map[string]int64{}}
		miss := func(format string, args ...any) {
			missing = append(missing, w.name+": "+fmt.Sprintf(format, args...))
		}
		if p.Metadata.UID != n.uid(w) {
			miss("no pod with its UID")
			continue
		}
		up := len(p.Status.ContainerStatuses) == len(w.containers) && p.Status.PodIP != ""
		for i := range p.Status.ContainerStatuses {
			running := p.Status.ContainerStatuses[i].State.Running
			// Of a pod of the API server's the kubelet repeats what it has told the server, before the boot for all it knows.
			up = up && running != nil && (n.api == nil || running.StartedAt.After(n.booted))
		}
		if !up {
			miss("not running")
			continue
		}
		for _, c := range w.containers {
			if !c.counts {
				continue
			}
			e, ok := s.logs[p.Metadata.UID+"/"+c.name][p.attempt(c.name)]
			if !ok {
				miss("no line of %s's attempt %d", c.name, p.attempt(c.name))
			}
			f.grows[c.name] = e.last
		}
		s.facts[w.name] = f
	}
	if len(missing) > 0 { // the machine has enough to do
		slices.Sort(missing)
		return s, errors.New(strings.Join(missing, "; "))
	}
	for _, w := range n.pods {
		if w.ask == nil {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
			defer cancel()
			f, err := w.ask(ctx, n, s.pods[w.name].Status.PodIP)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				missing = append(missing, fmt.Sprintf("%s: %v", w.name, err))
				return
			}
			s.facts[w.name] = f
		}()
	}
	wg.Wait()
	if len(missing) > 0 {
		slices.Sort(missing)
		return s, errors.New(strings.Join(missing, "; "))
	}
	return s, nil
}

// uid is the UID of the pod that should be there now.
func (n *node) uid(w workload) string {
	if n.api != nil {
		return n.api.uids[w.name]
	}
	return w.uid(n.generation[w.name])
}

func (p pod) attempt(name string) int {
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == name {
			return c.RestartCount
		}
	}
	return -1
}

// await looks until all of the pods answer and ok, if any, is content.
func (n *node) await(what string, limit time.Duration, ok func(state) error) state {
	n.t.Helper()
	limit *= slow
	var s state
	var err error
	said := ""
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(5 * time.Second) {
		select {
		case <-n.done:
			n.t.Fatalf("%s: the machine went off; its console:\n%s", what, n.tail())
		default:
		}
		if s, err = n.look(context.Background()); err == nil && ok != nil {
			err = ok(s)
		}
		if err == nil {
			n.log("%s: done", what)
			return s
		}
		if now := err.Error(); now != said {
			n.log("%s: %.300s", what, now)
			said = now
		}
	}
	n.explain()
	n.t.Fatalf("%s: after %v: %v\nconsole:\n%s", what, limit, err, n.tail())
	return s
}

// up waits until the agent answers.
func (n *node) up(limit time.Duration) {
	n.t.Helper()
	limit *= slow
	var err error
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Second) {
		var out string
		if out, err = n.sh(20*time.Second, "uname -r"); err == nil {
			n.log("up: kernel %s", strings.TrimSpace(out))
			return
		}
		select {
		case <-n.done:
			n.t.Fatalf("the machine went off; its console:\n%s", n.tail())
		default:
		}
	}
	n.t.Fatalf("no agent after %v: %v; its console:\n%s", limit, err, n.tail())
}

// explain keeps what the node knows about a failure beside the consoles.
func (n *node) explain() {
	out, err := n.sh(2*time.Minute, `export TERM=dumb
		echo '# events'; cat /var/lib/stasis/events.jsonl
		echo '# status'; stasis status; stasis ls; stasis doctor; systemctl --failed --no-pager
		crictl pods; crictl ps -a
		echo '# logs'; cd /var/log/pods && ls -l */*/ && tail -n 3 */*/*.log
		echo '# journal of earlier boots'; journalctl --no-pager -o short-monotonic -b -1 -u kubelet -u containerd -u 'stasis*' -u 'systemd-logind*' -u init.scope | cut -c1-600 | tail -400
		echo '# journal'; journalctl --no-pager -o short-monotonic -b | cut -c1-600 | tail -3000
		for f in /var/lib/stasis/quarantine/*/*.log; do echo "# $f"; tail -50 $f; done
		:`)
	name := filepath.Join(n.dir, "node-"+strconv.Itoa(n.boots)+".log")
	os.WriteFile(name, []byte(out), 0o600) //nolint:errcheck // best effort
	n.log("the node's own view is in %s (%v)", filepath.Base(name), err)
}

// events is the log of what stasis did, oldest first.
func (n *node) events() []event.Event {
	n.t.Helper()
	var all []event.Event
	for _, line := range strings.Split(n.must(time.Minute, "cat /var/lib/stasis/events.jsonl 2>/dev/null || true"), "\n") {
		var e event.Event
		if json.Unmarshal([]byte(line), &e) == nil && e.Type != "" {
			all = append(all, e)
		}
	}
	return all
}
