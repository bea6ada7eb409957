package reboot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/log"
	"github.com/godbus/dbus/v5"
)

// Logind is what systemd-logind has to do with shutdowns.
type Logind interface {
	// MaxDelay is how long it lets a shutdown be held up.
	MaxDelay(ctx context.Context) (time.Duration, error)
	// Inhibit holds up every shutdown until the result is closed, or for
	// MaxDelay once it has begun.
	Inhibit(ctx context.Context) (io.Closer, error)
	// Shutdowns tells when a shutdown begins (true), and when it does not take
	// place after all (false). It is closed when the connection ends.
	Shutdowns() <-chan bool
	Close() error
}

const (
	loginName    = "org.freedesktop.login1"
	loginPath    = "/org/freedesktop/login1"
	loginManager = "org.freedesktop.login1.Manager"
)

// logind is the real one, on the system bus.
type logind struct {
	conn      *dbus.Conn
	object    dbus.BusObject
	shutdowns chan bool
}

// OpenLogind connects to systemd-logind. The connection ends with ctx.
func OpenLogind(ctx context.Context) (Logind, error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("logind: %w", err)
	}
	l := &logind{conn: conn, object: conn.Object(loginName, loginPath), shutdowns: make(chan bool, 1)}
	signals := make(chan *dbus.Signal, 16)
	conn.Signal(signals)
	err = conn.AddMatchSignalContext(ctx, dbus.WithMatchObjectPath(loginPath), dbus.WithMatchInterface(loginManager), dbus.WithMatchMember("PrepareForShutdown"))
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("logind: %w", err)
	}
	go func() { // ends with the connection, which closes signals
		defer close(l.shutdowns)
		for s := range signals {
			if s.Name != loginManager+".PrepareForShutdown" || len(s.Body) == 0 {
				continue
			}
			if down, ok := s.Body[0].(bool); ok {
				select {
				case l.shutdowns <- down:
				case <-conn.Context().Done():
				}
			}
		}
	}()
	return l, nil
}

func (l *logind) Shutdowns() <-chan bool { return l.shutdowns }
func (l *logind) Close() error           { return l.conn.Close() }

func (l *logind) MaxDelay(ctx context.Context) (time.Duration, error) {
	var v dbus.Variant
	err := l.object.CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, loginManager, "InhibitDelayMaxUSec").Store(&v)
	if err != nil {
		return 0, fmt.Errorf("logind: InhibitDelayMaxUSec: %w", err)
	}
	micros, ok := v.Value().(uint64)
	if !ok || micros > uint64(24*time.Hour/time.Microsecond) {
		return 0, fmt.Errorf("logind: InhibitDelayMaxUSec is %v", v)
	}
	return time.Duration(micros) * time.Microsecond, nil
}

func (l *logind) Inhibit(ctx context.Context) (io.Closer, error) {
	var fd dbus.UnixFD
	err := l.object.CallWithContext(ctx, loginManager+".Inhibit", 0, "shutdown", "stasis", "containers are being dumped", "delay").Store(&fd)
	if err != nil {
		return nil, fmt.Errorf("logind: Inhibit: %w", err)
	}
	return os.NewFile(uintptr(fd), "inhibitor"), nil
}

// MinDelay is the least MaxDelay that is of use; with less, only small nodes are
// dumped in time.
const MinDelay = 30 * time.Second

// Guard holds up shutdowns until the node is prepared for one, with o and with
// the kubelet stopped first. It serves until ctx or l ends, and returns why.
func (n *Node) Guard(ctx context.Context, l Logind, o Options) error {
	o.Kubelet, o.BestEffort = StopKubelet, true
	delay, err := l.MaxDelay(ctx)
	if err != nil {
		return err
	}
	if delay < MinDelay {
		log.G(ctx).WithField("delay", delay).Warn("logind holds up a shutdown for too short: raise InhibitDelayMaxSec in logind.conf, see contrib/systemd/logind-stasis.conf")
	}
	// What is left of the time is for thawing what could not be dumped.
	o.Timeout = max(delay-5*time.Second, delay/2)
	lock, err := l.Inhibit(ctx)
	if err != nil {
		return err
	}
	defer func() { lock.Close() }()
	log.G(ctx).WithField("delay", delay).Info("shutdowns wait until the containers are dumped")
	prepared := false
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case down, ok := <-l.Shutdowns():
			switch {
			case !ok:
				return errors.New("logind: the connection has ended")
			case down && !prepared:
				prepared = true
				n.prepareForShutdown(ctx, o)
				lock.Close()
			case !down && prepared:
				prepared = false
				if _, err := n.Abort(ctx); err != nil {
					log.G(ctx).WithError(err).WithField("op", "abort-reboot").Error("the shutdown does not take place, and not all containers go on; stasis prepare-reboot --abort tries again")
				}
				next, err := l.Inhibit(ctx)
				if err != nil {
					return err
				}
				lock = next
			}
		}
	}
}

func (n *Node) prepareForShutdown(ctx context.Context, o Options) {
	start := time.Now()
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("op", "prepare-reboot"))
	log.G(ctx).Info("the node goes down: dumping containers")
	o.Progress = func(done, total int, e Entry) {
		l := log.G(ctx).WithFields(log.Fields{"container_id": e.ContainerID, "checkpoint_id": e.CheckpointID,
			"duration_ms": e.Duration.Milliseconds(), "size_bytes": e.SizeBytes, "done": done, "total": total})
		if e.Result == Dumped {
			l.Info("container dumped")
		} else {
			l.WithField("reason", e.Reason).Warn("container not dumped")
		}
	}
	m, err := n.Prepare(ctx, o)
	l := log.G(ctx).WithField("duration_ms", time.Since(start).Milliseconds())
	switch {
	case err != nil:
		l.WithError(err).Error("the node is not prepared")
	case !m.Complete():
		l.Warn("the node is prepared, but for some containers")
	default:
		l.WithField("containers", len(m.Containers)).Info("the node is prepared")
	}
}
