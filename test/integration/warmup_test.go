package integration

import (
	"os/exec"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// serving answers after two seconds, and tells in its log how many requests it
// has had.
const serving = `
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
time.sleep(2)
n = 0
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        global n
        n += 1
        self.send_response(200)
        self.end_headers()
    def log_message(self, *a): pass
server = HTTPServer(("", 8000), H)
server.timeout = 0.1
while True:
    server.handle_request()
    print("count", n, "requests", flush=True)
`

// TestTemplateWarmup: a template is made of a container that has become ready and
// was warmed up, as its own user, and none of one that was not.
func TestTemplateWarmup(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	p := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"})
	src := p.start("c", "python", []string{"python3", "-c", serving})
	create := func(p *pod, more ...string) (string, error) {
		args := append([]string{"template", "create", name, "--pod", "default/" + p.config.Metadata.Name}, more...)
		out, err := exec.Command("stasis", args...).CombinedOutput()
		return string(out), err
	}
	if out, err := create(p, "--warmup-url", "http://pod:8000/"); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("it is not ready: %v: %s", err, out)
	}
	out, err := create(p, "--warmup-url", "http://pod:8000/", "--warmup-count", "30", "--wait", "60s", "--warmup-exec", "echo $HOSTNAME >/warm")
	if err != nil {
		t.Fatal(out)
	}
	t.Log(out)
	if got := src.mustExec("cat", "/warm"); got == "" {
		t.Error("no trace of the command")
	}
	src.stop(1)
	src.p.remove()
	c := clonePod(n, name).start("c", "python", []string{"python3", "-c", serving})
	c.waitCount(29)
	if ns, _ := counts(c.log()); ns[0] != 30 {
		t.Errorf("the clone has had %d requests", ns[0])
	}
	c.p.wantOutcome(event.Restored, "", name)

	user := n.runPod(name+"-user", map[string]string{checkpoint.AnnotationPolicy: "template"})
	u := user.start("c", "busybox", shell(counting), func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
	})
	u.waitCount(1)
	for command, want := range map[string]string{
		`id -u; exit 9`:                         "exit code 9: 1000",
		`["/none"]`:                             "/none",
		`grep CapEff /proc/self/status; exit 1`: "CapEff:\t0000000000000000",
		`yes | head -c 1000000; exit 3`:         "exit code 3",
	} {
		if out, err := create(user, "--warmup-exec", command); err == nil || !strings.Contains(out, strings.ReplaceAll(want, "\t", "?")) || len(out) > 4096 {
			t.Errorf("%s: %v: %.300s, want %q", command, err, out, want)
		}
	}
	if out, err := create(user, "--warmup-exec", "sleep 1000", "--warmup-timeout", "1s"); err == nil || !strings.Contains(out, "not done after 1s") {
		t.Errorf("a command without end: %v: %s", err, out)
	}
	eventually(t, "the command is gone", func() error {
		out, err := u.exec("sh", "-c", "! ps | grep -v grep | grep 'sleep 1000'")
		if err != nil {
			t.Log(out)
		}
		return err
	})
	// What is left behind holds nothing up.
	if out, err := create(user, "--warmup-exec", "sleep 1000 & exit 4"); err == nil || !strings.Contains(out, "exit code 4") {
		t.Errorf("a command that leaves a child: %v: %s", err, out)
	}
}
